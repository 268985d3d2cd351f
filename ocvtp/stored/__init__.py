"""What lies on the disk beside the data: read strictly, checked field by field, sealed with digests."""
