"""The sockets and HTTP of a server: what comes in, how it is refused, and what a browser and systemd are told."""
