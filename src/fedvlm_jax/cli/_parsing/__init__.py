"""Words of the command line as options: numbers, and the groups that a method or a data set brings with it."""
