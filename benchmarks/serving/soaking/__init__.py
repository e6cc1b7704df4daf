"""Parts of the soak: requests and their clients, what is counted of them, the servers' processes, record and report."""
