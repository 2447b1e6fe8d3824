"""What is wrong with a configuration, said with file, line and the nearest valid name; importing this loads nothing."""
