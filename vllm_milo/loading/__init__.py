"""Loading in seconds: what is compiled while weights are read (``ahead``), and where the time went (``account``)."""
