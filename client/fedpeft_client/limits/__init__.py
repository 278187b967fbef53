"""What a clinic decides, and how it is held to on the box: rules, hours, memory, bytes."""
