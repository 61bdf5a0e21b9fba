package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"meshd.dev/pkg/join"
	"meshd.dev/pkg/pki"
)

func joinCommand() *cobra.Command {
	var (
		cfg              nodeConfig
		token, tokenFile string
	)
	cmd := &cobra.Command{
		Use:   "join [HOST[:PORT]]",
		Short: "Make this machine a node of the cluster whose server is HOST, and run it",
		Long: `Join gets a certificate for this machine from the server with a token of
"meshctl token create", keeps it in DATA-DIR/node, and runs the node. Once
joined, HOST and token are not needed again: a start after a reboot is
"meshd join" alone. A machine whose Node object was deleted comes back with a
new token.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := readConfigFile(cmd); err != nil {
				return err
			}
			if err := cfg.complete(); err != nil {
				return err
			}
			token, err := readToken(token, tokenFile)
			if err != nil {
				return err
			}
			return runJoin(cmd.Context(), cfg, strings.Join(args, ""), token)
		},
	}
	cfg.flags(cmd.Flags())
	cmd.Flags().StringVar(&token, "token", "", "token that meshctl token create prints")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file that holds the token, so that it does not show in the process list")
	return cmd
}

func readToken(token, file string) (string, error) {
	if file == "" {
		return token, nil
	}
	if token != "" {
		return "", errors.New("--token and --token-file: give one of the two")
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("--token-file: %w", err)
	}
	return string(b), nil
}

func runJoin(ctx context.Context, cfg nodeConfig, server, token string) error {
	log, err := cfg.logger()
	if err != nil {
		return err
	}
	quietLibraries(log)
	frugal()
	if err := lockState(cfg.DataDir); err != nil {
		return err
	}
	creds := join.Credentials{Dir: cfg.state("node")}
	if creds.Joined() {
		if cfg.NodeName, err = creds.Node(); err != nil {
			return err
		}
		if err := joinAgain(ctx, creds, cfg.NodeName, server, token, log); err != nil {
			return err
		}
	} else if err := firstJoin(ctx, creds, cfg.NodeName, server, token, log); err != nil {
		return err
	}
	n, err := newNode(cfg, roleAgent, log)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	n.run(ctx, group)
	log.Info("meshd node runs", "node", cfg.NodeName, "server", n.client.Host)
	notifyReady()
	return group.Wait()
}

// joinAgain uses a token on a machine that has joined: after its Node was
// removed that is the way back. A token that is not good any more is no reason
// to stop a machine whose credentials are.
func joinAgain(ctx context.Context, creds join.Credentials, node, server, token string, log *slog.Logger) error {
	if server == "" || token == "" {
		return nil
	}
	tok, err := join.ParseToken(token)
	if err != nil {
		return err
	}
	ca, err := pki.LoadCert(creds.CA())
	if err != nil {
		return fmt.Errorf("node credentials: %w", err)
	}
	if pki.Hash(ca) != tok.CAHash {
		return fmt.Errorf("this machine belongs to another cluster than the token: to leave that one, stop meshd, remove %s, and join again", creds.Dir)
	}
	ctx, cancel := context.WithTimeout(ctx, joinAgainPatience)
	defer cancel()
	if err := creds.Join(ctx, server, tok, node); err != nil {
		log.Info("going on with the credentials this machine has", "token", tok.ID, "err", err)
	}
	return nil
}

// joinAgainPatience bounds the start of a machine whose server is away.
const joinAgainPatience = 5 * time.Second

// joinRetry is the pause between tries at a server that does not answer.
const joinRetry = time.Second

// firstJoin asks until the server answers; its refusal is final.
func firstJoin(ctx context.Context, creds join.Credentials, node, server, token string, log *slog.Logger) error {
	if server == "" || token == "" {
		return errors.New("this machine has not joined a cluster yet: give HOST and --token; `meshctl token create` on the server makes one")
	}
	tok, err := join.ParseToken(token)
	if err != nil {
		return err
	}
	log.Info("joining", "server", server, "node", node)
	for {
		err := creds.Join(ctx, server, tok, node)
		var refused join.Refused
		if err == nil || ctx.Err() != nil || errors.Is(err, join.ErrNotTrusted) || errors.As(err, &refused) && refused.Code < 500 {
			return err
		}
		log.Warn("the server does not answer yet; trying again", "after", joinRetry, "err", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(joinRetry):
		}
	}
}
