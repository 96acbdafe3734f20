"""What pipelines start: ranks on this machine, Ray on a cluster's nodes, tasks on workers."""
