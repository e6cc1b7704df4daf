"""What a conversion is going to do and to take, worked out from the headers of the source before anything is done."""
