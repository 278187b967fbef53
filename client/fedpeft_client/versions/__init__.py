"""What a box keeps of the federation's adapters: versions, which one answers, and why."""
