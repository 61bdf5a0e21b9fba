package shortcut

import (
	"slices"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// The program sits at the ingress of each pod's link on the host, that is
// where the pod's packets come in. It reads as follows, and whatever is not
// so, and every surprise, is left to the stack:
//
//	a whole TCP or UDP packet without options, with hops left, no SYN
//	under an address of the pod behind this very link
//	to an address of another pod of this machine
//	of a connection that conntrack knows, both sides of which were heard,
//	  and that nothing translates, follows with a helper, or takes down
//	the routes still lead that address to that pod, and the size fits
//
// Then conntrack is told that the connection lives, or ends, the packet gets
// the MACs it would have got, and goes straight into the pod.
//
// Registers: R6 the packet's context, R7 the length of the header of TCP or
// UDP, R8 where the packet begins, R9 where it ends, later the connection.

// parts are what the program is linked with.
type parts struct {
	// pods4 and pods6 are maps by address, taken counts.
	pods4, pods6, taken int
	conntrack           conntrack
}

// conntrack is what has to be known of the running kernel's: its functions,
// and where in its entries things are.
type conntrack struct {
	lookup, changeTimeout, release kfunc
	status, timeout, tcpState      int16
	// established and stream are how long an idle connection is remembered,
	// in milliseconds.
	established, stream int32
	// hz is how many of the kernel's ticks, which timeout counts, are a second.
	hz int32
}

// kfunc is a function of the kernel, as an instruction calls it: its number in
// the BTF of the kernel or, with offset 1, of the module.
type kfunc struct {
	id     int32
	offset int16
}

func (k kfunc) call() asm.Instruction {
	return asm.Instruction{OpCode: asm.OpCode(asm.JumpClass).SetJumpOp(asm.Call), Src: asm.PseudoKfuncCall, Offset: k.offset, Constant: int64(k.id)}
}

// Of linux/bpf.h: fields of struct __sk_buff, and of struct bpf_fib_lookup.
const (
	skbProtocol, skbVLAN, skbIfindex, skbData, skbDataEnd, skbGSOSize = 16, 20, 40, 76, 80, 176

	fibFamily, fibProtocol, fibSport, fibDport, fibTotLen, fibIfindex, fibTOS, fibSrc, fibDst, fibSMAC, fibDMAC = 0, 1, 2, 4, 6, 8, 12, 16, 32, 52, 58

	fibSize, ctOptsSize = 64, 12

	next = -1 // TCX_NEXT
)

// Bits of linux/netfilter/nf_conntrack_common.h: what a connection must have,
// and what it must not have.
const (
	ctSeenReply, ctAssured, ctConfirmed = 1 << 1, 1 << 2, 1 << 3

	// With UDP assured is what went on for two seconds; what is not is soon
	// forgotten, and the first to go when the table is full.
	ctHeard = ctSeenReply | ctAssured | ctConfirmed

	ctNotOurs = 1<<4 | 1<<5 | // translated: source, destination
		1<<6 | // sequence numbers adjusted
		1<<9 | // dying
		1<<12 | // two of the same name
		1<<13 // followed by a helper

	ctTCPEstablished = 3
)

// How long a connection is remembered, in milliseconds, one side of which has
// closed it, which is what conntrack gives CLOSE_WAIT; and one that is over:
// what it gives CLOSE. For conntrack both are still established, and so are
// none that give way when its table is full; hence not TIME_WAIT's two minutes.
const half, over = 60_000, 10_000

// halfTicks bounds the time that is left of a connection that one side closed.
// There is no other mark on it.
func (c conntrack) halfTicks() int32 { return half/1000*c.hz + 1 }

// Where things are on the program's stack, below the frame pointer.
const (
	stackKey     = -16  // an address
	stackIfindex = -24  // of the link the packet is to leave by
	stackTimeout = -32  // to give the connection, 0 for as it is
	stackAfter   = -28  // the same, if a side closed it before
	stackTuple   = -72  // struct bpf_sock_tuple
	stackFib     = -136 // struct bpf_fib_lookup
	stackCtOpts  = -152 // struct bpf_ct_opts
	stackMACs    = -168 // of the packet: destination, source
)

// ip is what differs between the families. Offsets are from the beginning of
// the packet.
type ip struct {
	name              string
	etherType, family int32
	length            int16 // of the header
	total, withTotal  int16 // where the length stands, and what it does not count
	hops, proto       int16
	src, dst          int16
	addrSize          int16
}

const ethLen = 14

var (
	ip4 = ip{name: "4", etherType: unix.ETH_P_IP, family: unix.AF_INET, length: 20, total: ethLen + 2, hops: ethLen + 8, proto: ethLen + 9,
		src: ethLen + 12, dst: ethLen + 16, addrSize: 4}
	ip6 = ip{name: "6", etherType: unix.ETH_P_IPV6, family: unix.AF_INET6, length: 40, total: ethLen + 4, withTotal: 40, hops: ethLen + 7, proto: ethLen + 6,
		src: ethLen + 8, dst: ethLen + 24, addrSize: 16}
)

// program is the whole.
func program(p parts) asm.Instructions {
	return slices.Concat(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R2, asm.R6, skbVLAN, asm.Word),
			asm.JNE.Imm(asm.R2, 0, "pass"),
			asm.LoadMem(asm.R8, asm.R6, skbData, asm.Word),
			asm.LoadMem(asm.R9, asm.R6, skbDataEnd, asm.Word),
			asm.LoadMem(asm.R2, asm.R6, skbProtocol, asm.Word),
			asm.HostTo(asm.BE, asm.R2, asm.Half),
			asm.JEq.Imm(asm.R2, ip4.etherType, "ip4"),
			asm.JEq.Imm(asm.R2, ip6.etherType, "ip6"),
			asm.Ja.Label("pass"),
		},
		ip4.packet(), tcp.over(ip4, p.pods4, p), udp.over(ip4, p.pods4, p),
		ip6.packet(), tcp.over(ip6, p.pods6, p), udp.over(ip6, p.pods6, p),
		asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R9).WithSymbol("release"),
			p.conntrack.release.call(),
			asm.Mov.Imm(asm.R0, next).WithSymbol("pass"),
			asm.Return(),
		})
}

// packet: a whole one without options, with hops left (the stack would not
// forward it with its last one).
func (f ip) packet() asm.Instructions {
	ins := labelled("ip"+f.name, reaches(ethLen+f.length))
	if f.family == unix.AF_INET {
		ins = append(ins,
			asm.LoadMem(asm.R2, asm.R8, ethLen, asm.Byte),
			asm.JNE.Imm(asm.R2, 0x45, "pass"), // version 4, 5 words of header
			asm.LoadMem(asm.R2, asm.R8, ethLen+6, asm.Half),
			asm.HostTo(asm.BE, asm.R2, asm.Half),
			asm.JSet.Imm(asm.R2, 0x3fff, "pass")) // more fragments follow, or came before
	}
	return append(ins,
		asm.LoadMem(asm.R2, asm.R8, f.hops, asm.Byte),
		asm.JLE.Imm(asm.R2, 1, "pass"),
		asm.LoadMem(asm.R2, asm.R8, f.proto, asm.Byte),
		asm.JEq.Imm(asm.R2, unix.IPPROTO_TCP, "tcp"+f.name),
		asm.JEq.Imm(asm.R2, unix.IPPROTO_UDP, "udp"+f.name),
		asm.Ja.Label("pass"))
}

// reaches goes on when so many bytes of the packet are in one piece.
func reaches(bytes int16) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Add.Imm(asm.R2, int32(bytes)),
		asm.JGT.Reg(asm.R2, asm.R9, "pass"),
	}
}

func labelled(label string, ins asm.Instructions) asm.Instructions {
	ins[0] = ins[0].WithSymbol(label)
	return ins
}

// transport is TCP or UDP.
type transport struct {
	name   string
	number int32
	length int16 // of the header, at least
}

var (
	udp = transport{"udp", unix.IPPROTO_UDP, 8}
	tcp = transport{"tcp", unix.IPPROTO_TCP, 20}
)

// over is the way of one kind of packet from top to bottom.
func (t transport) over(f ip, pods int, p parts) asm.Instructions {
	begin := labelled(t.name+f.name, reaches(ethLen+f.length+t.length))
	return slices.Concat(begin, f.betweenPods(pods), t.header(f, p.conntrack), f.size(t), t.connection(f, p.conntrack),
		t.route(f), deliver(p.taken))
}

// betweenPods: from the pod behind this link, to one of this machine.
func (f ip) betweenPods(pods int) asm.Instructions {
	return slices.Concat(
		f.find(pods, f.src),
		asm.Instructions{
			asm.LoadMem(asm.R2, asm.R0, 0, asm.Word),
			asm.LoadMem(asm.R3, asm.R6, skbIfindex, asm.Word),
			asm.JNE.Reg(asm.R2, asm.R3, "pass"),
		},
		f.find(pods, f.dst),
		asm.Instructions{
			asm.LoadMem(asm.R2, asm.R0, 0, asm.Word),
			asm.StoreMem(asm.RFP, stackIfindex, asm.R2, asm.Word),
		})
}

// find leaves in R0 where the map has the link of an address.
func (f ip) find(pods int, addr int16) asm.Instructions {
	return append(f.copyAddr(addr, stackKey),
		asm.LoadMapPtr(asm.R1, pods),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, stackKey),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"))
}

func (f ip) copyAddr(from, to int16) (ins asm.Instructions) {
	for i := int16(0); i < f.addrSize; i += 4 {
		ins = append(ins, asm.LoadMem(asm.R2, asm.R8, from+i, asm.Word), asm.StoreMem(asm.RFP, to+i, asm.R2, asm.Word))
	}
	return ins
}

// header leaves the length of both headers in R7, and in stackTimeout and
// stackAfter what the packet means for the connection: data keep it, but not
// for days if a side closed it before; an end lets it be forgotten soon, and
// the other side's still sooner; a mere acknowledgement says neither, for it
// comes behind an end as well. It needs R3 and R4 as size computes them.
func (t transport) header(f ip, c conntrack) asm.Instructions {
	l4 := ethLen + f.length
	size := asm.Instructions{
		asm.LoadMem(asm.R3, asm.R8, f.total, asm.Half),
		asm.HostTo(asm.BE, asm.R3, asm.Half),
		asm.Add.Imm(asm.R3, int32(f.withTotal)),
		asm.LoadMem(asm.R4, asm.R6, skbGSOSize, asm.Word),
	}
	if t.number == unix.IPPROTO_UDP {
		return append(size,
			asm.Mov.Imm(asm.R7, int32(f.length+8)),
			asm.StoreImm(asm.RFP, stackTimeout, int64(c.stream), asm.Word))
	}
	known := "known" + f.name
	return append(size,
		asm.LoadMem(asm.R7, asm.R8, l4+12, asm.Byte), // in words, in the upper half
		asm.RSh.Imm(asm.R7, 4),
		asm.LSh.Imm(asm.R7, 2),
		asm.Add.Imm(asm.R7, int32(f.length)),
		asm.LoadMem(asm.R2, asm.R8, l4+13, asm.Byte),
		asm.JSet.Imm(asm.R2, tcpSYN, "pass"), // conntrack wants to see how it begins
		asm.Mov.Imm(asm.R5, over),
		asm.Mov.Imm(asm.R1, over),
		asm.JSet.Imm(asm.R2, tcpRST, known),
		asm.Mov.Imm(asm.R5, half),
		asm.JSet.Imm(asm.R2, tcpFIN, known),
		asm.Mov.Imm(asm.R5, c.established),
		asm.Mov.Imm(asm.R1, min(half, c.established)),
		asm.JNE.Imm(asm.R4, 0, known),
		asm.JGT.Reg(asm.R3, asm.R7, known),
		asm.Mov.Imm(asm.R5, 0),
		asm.StoreMem(asm.RFP, stackTimeout, asm.R5, asm.Word).WithSymbol(known),
		asm.StoreMem(asm.RFP, stackAfter, asm.R1, asm.Word))
}

const tcpFIN, tcpSYN, tcpRST = 1, 2, 4

// size of what has to fit the MTU: the packet, or the segments it stands for.
func (f ip) size(t transport) asm.Instructions {
	whole := "whole" + t.name + f.name
	return asm.Instructions{
		asm.JEq.Imm(asm.R4, 0, whole),
		asm.Mov.Reg(asm.R3, asm.R4),
		asm.Add.Reg(asm.R3, asm.R7),
		asm.JGT.Imm(asm.R3, 0xffff, "pass").WithSymbol(whole),
		asm.StoreMem(asm.RFP, stackFib+fibTotLen, asm.R3, asm.Half),
	}
}

// connection: one that conntrack knows from both sides and that is nobody's
// else. What it is told is what it would have concluded.
func (t transport) connection(f ip, c conntrack) asm.Instructions {
	quiet := "quiet" + t.name + f.name
	ins := slices.Concat(
		f.copyAddr(f.src, stackTuple), f.copyAddr(f.dst, stackTuple+f.addrSize),
		asm.Instructions{
			asm.LoadMem(asm.R2, asm.R8, ethLen+f.length, asm.Word), // both ports
			asm.StoreMem(asm.RFP, stackTuple+2*f.addrSize, asm.R2, asm.Word),
			asm.StoreImm(asm.RFP, stackCtOpts, unix.BPF_F_CURRENT_NETNS, asm.Word),
			asm.StoreImm(asm.RFP, stackCtOpts+4, 0, asm.Word), // an error, when it comes back
			asm.StoreImm(asm.RFP, stackCtOpts+8, int64(t.number), asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, stackTuple),
			asm.Mov.Imm(asm.R3, int32(2*f.addrSize+4)),
			asm.Mov.Reg(asm.R4, asm.RFP),
			asm.Add.Imm(asm.R4, stackCtOpts),
			asm.Mov.Imm(asm.R5, ctOptsSize),
			c.lookup.call(),
			asm.JEq.Imm(asm.R0, 0, "pass"),
			asm.Mov.Reg(asm.R9, asm.R0),
			asm.LoadMem(asm.R2, asm.R9, c.status, asm.DWord),
			asm.JSet.Imm(asm.R2, ctNotOurs, "release"),
			asm.And.Imm(asm.R2, ctHeard),
			asm.JNE.Imm(asm.R2, ctHeard, "release"),
		})
	if t.number == unix.IPPROTO_TCP {
		ins = append(ins,
			asm.LoadMem(asm.R2, asm.R9, c.tcpState, asm.Byte),
			asm.JNE.Imm(asm.R2, ctTCPEstablished, "release"))
	}
	ins = append(ins,
		asm.LoadMem(asm.R2, asm.RFP, stackTimeout, asm.Word),
		asm.JEq.Imm(asm.R2, 0, quiet))
	tell := "tell" + t.name + f.name
	if t.number == unix.IPPROTO_TCP {
		ins = append(ins,
			asm.FnJiffies64.Call(),
			asm.LoadMem(asm.R1, asm.R9, c.timeout, asm.Word),
			asm.Sub.Reg(asm.R1, asm.R0),
			asm.LoadMem(asm.R2, asm.RFP, stackTimeout, asm.Word),
			asm.JSGT.Imm32(asm.R1, c.halfTicks(), tell),
			asm.LoadMem(asm.R2, asm.RFP, stackAfter, asm.Word))
	}
	return append(ins,
		asm.Mov.Reg(asm.R1, asm.R9).WithSymbol(tell),
		c.changeTimeout.call(),
		asm.Mov.Reg(asm.R1, asm.R9).WithSymbol(quiet),
		c.release.call())
}

// route: the routes still lead to the link that the pod was behind when the
// map was written, and the packet fits. They are the truth that the plugin
// itself keeps: a pod that is gone, and one that has its address now, are told
// apart whether meshd lives or not.
func (t transport) route(f ip) asm.Instructions {
	flow := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R8, ethLen+1, asm.Byte),
		asm.StoreMem(asm.RFP, stackFib+fibTOS, asm.R2, asm.Word),
	}
	if f.family == unix.AF_INET6 {
		flow = asm.Instructions{
			asm.LoadMem(asm.R2, asm.R8, ethLen, asm.Word),
			asm.HostTo(asm.BE, asm.R2, asm.Word),
			asm.And.Imm(asm.R2, 0x0fffffff),
			asm.HostTo(asm.BE, asm.R2, asm.Word),
			asm.StoreMem(asm.RFP, stackFib+fibTOS, asm.R2, asm.Word),
		}
	}
	return slices.Concat(
		flow, f.copyAddr(f.src, stackFib+fibSrc), f.copyAddr(f.dst, stackFib+fibDst),
		asm.Instructions{
			asm.StoreImm(asm.RFP, stackFib+fibFamily, int64(f.family), asm.Byte),
			asm.StoreImm(asm.RFP, stackFib+fibProtocol, int64(t.number), asm.Byte),
			asm.LoadMem(asm.R2, asm.R8, ethLen+f.length, asm.Half),
			asm.StoreMem(asm.RFP, stackFib+fibSport, asm.R2, asm.Half),
			asm.LoadMem(asm.R2, asm.R8, ethLen+f.length+2, asm.Half),
			asm.StoreMem(asm.RFP, stackFib+fibDport, asm.R2, asm.Half),
			asm.LoadMem(asm.R2, asm.R6, skbIfindex, asm.Word),
			asm.StoreMem(asm.RFP, stackFib+fibIfindex, asm.R2, asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, stackFib),
			asm.Mov.Imm(asm.R3, fibSize),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnFibLookup.Call(),
			asm.JNE.Imm(asm.R0, 0, "pass"),
			asm.LoadMem(asm.R7, asm.RFP, stackFib+fibIfindex, asm.Word),
			asm.LoadMem(asm.R2, asm.RFP, stackIfindex, asm.Word),
			asm.JNE.Reg(asm.R2, asm.R7, "pass"),
		})
}

// deliver under the MACs that the link would have given it.
func deliver(taken int) asm.Instructions {
	var ins asm.Instructions
	for i := int16(0); i < 6; i += 2 { // the lookup has the source first
		ins = append(ins,
			asm.LoadMem(asm.R2, asm.RFP, stackFib+fibDMAC+i, asm.Half),
			asm.StoreMem(asm.RFP, stackMACs+i, asm.R2, asm.Half),
			asm.LoadMem(asm.R2, asm.RFP, stackFib+fibSMAC+i, asm.Half),
			asm.StoreMem(asm.RFP, stackMACs+6+i, asm.R2, asm.Half))
	}
	return append(ins,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, stackMACs),
		asm.Mov.Imm(asm.R4, 12),
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, "pass"),
		asm.StoreImm(asm.RFP, stackKey, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, taken),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, stackKey),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.LoadMem(asm.R2, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R2, 1),
		asm.StoreMem(asm.R0, 0, asm.R2, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirectPeer.Call(),
		asm.Return())
}
