"""The way to the server and back: calls, outages, and a restart's place in the queue."""
