// Package cni attaches pods to the mesh: the CNI plugin "mesh" and what the
// daemon needs around it.
//
// A pod gets a veth pair and no bridge. Its end holds a /32 and a /128 and a
// default route through 169.254.1.1 and fe80::1, which nobody owns: permanent
// neighbour entries stand for them, so that neither ARP nor neighbour
// discovery nor router advertisements have a part in reaching a pod. The
// host's end has one host route a family (route protocol 78).
//
// Everything the plugin knows is in the network configuration and in one
// folder: it starts no process, calls no API and no daemon, so that pods come
// and go while meshd is down.
//
// # Protected before it is reached
//
// The firewall drops what comes from or goes to a pod's link unless link and
// address are in its sets. ADD puts them in, with the host ports, straight into the
// kernel (admit.go), before it routes anything to the pod; it fails where the
// table is missing. What a policy has to know of a pod before its first packet
// belongs at the same place. The daemon keeps the sets as the records say
// (Attached): they are its memory of who was admitted.
//
// # Files
//
// DataDir/NETWORK/ holds one file an attachment. Its name is the reservation:
//
//	10.244.1.5,fd00:10:244:1::5,eth0,3f2a…
//	address    address          if   container ID
//
// so that one rename takes or gives back all addresses of a pod at once, and
// reading the folder is all that choosing an address needs. The content is a
// Record in JSON. Beside them: "lock" (held while an address is chosen),
// "boot" (the boot the records belong to), freed/ (given back, first those
// given back first; the next record is written into the first file there, whose
// name goes to freed/log), *.corrupt (set aside; the address stays taken until
// the kernel proves that nobody uses it).
//
// # What a crash leaves
//
// The record is on disk before the first change to the kernel (what only asks
// goes on meanwhile) and goes after the last, so that whatever is left of a pod has a record, or is a link of
// ours without one (or, in the firewall, speaks of such a link). DEL, GC and Sweep clean up both. A record's file is
// locked (flock) by the process that works on it: a record whose lock can be
// had belongs to nobody at work. A record of another boot is void, because
// links and namespaces do not survive one.
package cni
