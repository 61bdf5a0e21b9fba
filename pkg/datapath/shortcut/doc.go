// Package shortcut carries packets from one pod of this machine straight into
// another, past the machine's own stack: a small eBPF program at the ingress
// of each pod's link, where the kernel can (tcx, Linux 6.6). Nothing needs it.
//
// What it leaves out is a queue, a walk through the routes, and all rules. So
// it takes only packets about which the rules have nothing to say any more:
// of a connection that the firewall let begin, in which both sides were heard
// (with UDP: for two seconds), and which nothing translates. Each packet is looked up in conntrack, and the
// stack has it whenever the answer is not plain (program.go has the list).
//
// Two ways to know that were thought through. A table of our own of the
// connections that began directly needs no look at conntrack; but conntrack
// would not know these connections then, and could not keep one that a service
// leads to the same pod from the same port apart from them (the second would
// kill the first), and what is pushed out of a full table is lost or, worse,
// taken for something else. Conntrack asked each time is never wrong, since it
// is conntrack that translates; it costs a few tenths of a microsecond, and
// what is forgotten there merely goes the long way once. Hence also
//
//   - SYNs, and all there is before both sides spoke, are conntrack's to see,
//     so every connection on the shortcut is one that it knows;
//   - the program tells it that a connection is used, or closed, by how long it
//     is remembered: its state stays established to the end;
//   - it has not followed the windows of these connections. Before they leave
//     the shortcut it is made to forget them and takes them up anew, as it
//     does with any whose beginning it missed (nf_conntrack_tcp_loose). For the
//     same reason both directions enter at once: plan.go has the order.
//
// That is so for what we do. A single packet that the program leaves to the
// stack (options of IP on one side, an extension header, a VLAN tag, a header
// in pieces), and all of one direction when somebody removes a neighbour or
// takes the program off a link, is judged by windows that conntrack did not
// follow, and may be called invalid. Our rules let it pass; those of others
// (kube-proxy, firewalld) may drop it. Where that is seen,
// net.netfilter.nf_conntrack_tcp_be_liberal=1 ends it.
//
// Who is where comes from two sources that must agree: a map from address to
// link, which meshd writes, and the routes, which the plugin keeps. The map
// says whose packets may be taken at all: pods that are recorded, whose link
// has no queue (bandwidth), no filters, and no program of somebody else's at
// either hook of tcx. The kernel tells nobody of those programs, so one that
// comes is found within half a minute; nft chains of the netdev family at a
// pod's link are not seen at all. A pod that is not in it goes the
// long way; that is the door for what else may have to filter. A link's number
// is not used twice, so an entry that nobody takes away, because meshd is dead,
// is about nobody; the address itself may be another pod's by now, and then the
// routes say so.
//
// State is in the kernel alone: the links hold the program, the program its
// maps, and both go with the pods. Nothing is pinned. A meshd that starts
// loads its own program and puts it in the place of the one that is there,
// without a moment in between.
//
// What else does not see these packets: tcpdump at the link they would leave
// by (at the one they come in by, it does), counters of rules, and rules of
// others in the forward hook, which see how a connection begins and nothing
// after that. Who has such rules and changes them under living connections
// should switch the shortcut off.
package shortcut
