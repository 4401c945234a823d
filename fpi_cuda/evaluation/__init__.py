"""What it takes to evaluate a user's g again and again, and to find the same."""
