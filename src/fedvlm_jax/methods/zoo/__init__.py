"""One file per federated method; the file's name is the method's."""
