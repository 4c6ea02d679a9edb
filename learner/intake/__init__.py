"""Tickets out, groups in: everything between the sockets and a batch of groups. No torch here."""
