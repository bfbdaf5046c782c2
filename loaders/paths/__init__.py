"""Which folders and files a workflow may name."""
