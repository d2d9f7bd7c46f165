"""One file a format or a data set."""
