"""The central site on disk: its directory, identity, authority, and whether it is whole."""
