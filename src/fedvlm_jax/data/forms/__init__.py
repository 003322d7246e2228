"""Forms that people's own data have, a file each with the class of its options."""
