"""Parts of the soak: requests and their clients, the servers' processes, the report."""
