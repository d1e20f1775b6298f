"""Moving bytes between ranks: transports, rendezvous and launching. Knows no dtype, operation or algorithm."""
