"""Statistics over clients and over seeds."""
