"""The server: requests of many clients over HTTP, answered by one engine."""
