"""Flower's server inside this process: one TLS socket, its message store, and who may ask."""
