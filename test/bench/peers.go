package main

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"meshd.dev/test/story"
)

// manyPeers is how many other nodes the device is told of.
const manyPeers = 1000

// peers measures what idle peers cost a device process: memory, and the time
// to tell it of all and of one.
func peers(ctx context.Context, _ *story.World, o options) ([]row, error) {
	bin, err := binaries(o)
	if err != nil {
		return nil, err
	}
	ours, official := bin.ours(1420), bin.official(1420)
	return inLab(ctx, []*variant{ours, official}, func(l *lab) ([]row, error) {
		a, err := l.addPeers(ctx, ours)
		if err != nil {
			return nil, err
		}
		b, err := l.addPeers(ctx, official)
		if err != nil {
			return nil, err
		}
		return []row{
			{fmt.Sprintf("memory of a peer, of %d", manyPeers), fmt.Sprintf("%.1f KB", a.memory/1e3), fmt.Sprintf("%.1f KB official", b.memory/1e3), "goal <= 25; not backed by files, a minute after"},
			{fmt.Sprintf("telling a device of %d peers", manyPeers), ms(a.all), ms(b.all) + " official", "over the control socket"},
			{fmt.Sprintf("changing one of %d peers", manyPeers), fmt.Sprintf("%.3f ms", a.one.Seconds()*1e3), fmt.Sprintf("%.3f ms official", b.one.Seconds()*1e3), "median of 100, over the control socket; goal < 1"},
		}, nil
	})
}

type peerCost struct {
	memory   float64 // bytes, of each
	all, one time.Duration
}

func (l *lab) addPeers(ctx context.Context, v *variant) (c peerCost, err error) {
	before, err := rssAnon(v.pids[0])
	if err != nil {
		return c, err
	}
	var keys []string
	var all strings.Builder
	for i := range manyPeers {
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			return c, err
		}
		keys = append(keys, hex.EncodeToString(key.PublicKey().Bytes()))
		fmt.Fprintf(&all, "public_key=%s\nendpoint=192.0.2.2:9\nallowed_ip=10.%d.%d.0/24\n", keys[i], 100+i/250, i%250)
	}
	start := time.Now()
	if err := uapi(v.dev(0), all.String()); err != nil {
		return c, err
	}
	c.all = time.Since(start)
	var times []time.Duration
	for i := range 100 {
		start := time.Now()
		if err := uapi(v.dev(0), fmt.Sprintf("public_key=%s\nupdate_only=true\nallowed_ip=10.200.%d.0/24\n", keys[i*7%manyPeers], i)); err != nil {
			return c, err
		}
		times = append(times, time.Since(start))
	}
	c.one = quantile(times, .5)
	select { // the collector gives back within its minutes; what stays is the cost
	case <-ctx.Done():
		return c, ctx.Err()
	case <-time.After(time.Minute):
	}
	after, err := rssAnon(v.pids[0])
	c.memory = float64(after-before) / manyPeers
	return c, err
}
