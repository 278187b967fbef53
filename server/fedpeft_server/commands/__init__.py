"""The topics of the program ``fedpeft-server``, a module each."""
