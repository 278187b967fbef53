"""The rounds of a run: asked for, collected, aggregated, evaluated and made durable."""
