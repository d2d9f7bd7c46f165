"""From a module to the list of ops that the fused engine runs."""
