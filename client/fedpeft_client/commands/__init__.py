"""The commands of ``fedpeft-client`` by topic, each module with an ``app`` of its own."""
