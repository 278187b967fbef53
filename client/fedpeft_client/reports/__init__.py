"""What a box tells the people who look after it."""
