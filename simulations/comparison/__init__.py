"""`fedward compare`: one table of systems, privacies and arrangements, on the same patients."""
