"""A stranger's JSON and files become a checked job."""
