// Package netlab makes machines on one host: a machine is a namespace of every
// kind (net, mount, pid, uts, ipc, cgroup) with a root file system of its own,
// a disk that outlives a power cut, and a link to an underlay that belongs to
// the lab alone. What runs in it finds stock paths, its own containerd, and no
// way to the host's network.
//
// The address plan, the same in every lab because no two labs share a network:
//
//	172.31.77.0/24  fd31:77::/64   the underlay; machine N is .N and ::N
//	172.31.77.254   fd31:77::fe    the default gateway, which does not exist
//
// A machine has a first process that only buries the dead, or a System of its
// own, as systemd.
//
// The program that uses the package is its own helper: it must call Init as
// the first thing in main or TestMain.
//
// Reading order: lab.go (what a lab is), machine.go (what a machine can do),
// boot.go (how one comes up), system.go (an init of its own), cgroup.go (the two kinds of hosts).
package netlab
