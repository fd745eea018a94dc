"""What the tests stand on: real ranks, and fp16 on the CPU."""
