"""What survives a kill: files that are whole or absent, the lock of an output, layers on the disk, publication."""
