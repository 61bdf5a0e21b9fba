package shortcut

import (
	"context"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// watch kicks when links come, go, or get queues, until ctx ends.
func watch(ctx context.Context, kick func()) error {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return fmt.Errorf("watch links: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	for _, group := range []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_TC} {
		if err := conn.JoinGroup(group); err != nil {
			return fmt.Errorf("watch links: %w", err)
		}
	}
	for {
		_, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !errors.Is(err, unix.ENOBUFS): // messages that were lost are a reason to look, too
			return fmt.Errorf("watch links: %w", err)
		}
		kick()
	}
}
