"""What a person or a log sees while something runs."""
