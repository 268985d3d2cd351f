"""What the command line does, one file per command. Heavy imports wait until a command runs."""
