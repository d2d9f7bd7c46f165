"""The console program, one file a command."""
