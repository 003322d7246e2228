"""The command as a process: how it starts, what signals do to it, and the processes that it starts."""
