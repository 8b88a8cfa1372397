"""Floor 3, sees every room: settings, the route, sockets, the process, the command."""
