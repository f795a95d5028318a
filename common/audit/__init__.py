"""What a ledger proves, for whoever has only the file: verify, price, report, reconcile."""
