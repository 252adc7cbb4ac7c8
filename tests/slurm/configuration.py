"""What the daemons of the throw-away cluster are told, and what brings up its network."""

LOOPBACK = """
import fcntl, socket, struct, time
def ask(request, name, content):
    fcntl.ioctl(socket.socket(), request, struct.pack("16s16s", name, content))
# SIOCSIFFLAGS, IFF_UP
ask(0x8914, b"lo", struct.pack("H", 1))
# SIOCSIFADDR: with 127.0.0.1 alone getaddrinfo takes the machine for one without IPv4 (AI_ADDRCONFIG).
ask(0x8916, b"lo:1", struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton("127.0.0.2")))
print("up", flush=True)
time.sleep(1e9)
"""
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s by default). Of the times that follow none may be
# so short that a machine which is busy, or stops for a few seconds, makes Slurm take a node for dead, or repeat a message.
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
PlugStackConfig={folder}/plugstack.conf
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=30
InactiveLimit=0
KillWait=90
MinJobAge=3600
CompleteWait=0
EpilogMsgTime=0
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{gres}
"""
PARTITIONS = """\
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cheap Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=gentle Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
