"""How vectors and tasks travel: TLS identity, chunking, generated stubs."""
