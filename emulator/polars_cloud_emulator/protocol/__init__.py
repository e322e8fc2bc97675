"""The client's wire protocol: transports, messages, login, journal."""
