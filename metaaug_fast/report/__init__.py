"""Results for people: pictures and tables."""
