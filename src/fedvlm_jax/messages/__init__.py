"""Messages between the clients' updates and the server's `aggregate`: pools, compression, simulated attackers."""
