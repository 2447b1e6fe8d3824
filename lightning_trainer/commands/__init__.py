"""What the command line runs, one module per command; each is imported only when it is used."""
