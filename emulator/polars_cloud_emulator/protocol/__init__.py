"""The client's wire protocol: transports, messages, login and the journal."""
