"""From a hostfile to running ranks: the machines, what they say of themselves, the launcher's command."""
