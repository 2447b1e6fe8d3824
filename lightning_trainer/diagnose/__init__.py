"""What a run will do, said before it runs."""
