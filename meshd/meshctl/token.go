package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"meshd.dev/pkg/join"
	"meshd.dev/pkg/pki"
)

func tokenCommand(w *where) *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Tokens with which machines join the cluster"}
	cmd.AddCommand(tokenCreate(w), tokenList(w), tokenRevoke(w))
	return cmd
}

func tokenCreate(w *where) *cobra.Command {
	var (
		life     time.Duration
		reusable bool
		describe string
		command  bool
	)
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a token: good for one machine, for ten minutes, unless told otherwise",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if life < 0 {
				return errors.New("--ttl: want a duration like 10m, or 0 for a token that never expires")
			}
			ca, err := pki.LoadCert(filepath.Join(w.dataDir, "pki", "ca.crt"))
			if err != nil {
				return fmt.Errorf("certificate authority: %w; make tokens on a server", err)
			}
			client, err := w.client()
			if err != nil {
				return err
			}
			t := join.NewToken(pki.Hash(ca))
			info := join.TokenInfo{Reusable: reusable, Description: describe}
			if err := join.CreateToken(cmd.Context(), client, t, life, info); err != nil {
				return err
			}
			if command {
				server, err := serverAddress(w)
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "meshd join %s --token %s\n", server, t)
				return nil
			}
			fmt.Fprintln(cmd.OutOrStdout(), t)
			return nil
		},
	}
	cmd.Flags().DurationVar(&life, "ttl", 10*time.Minute, "how long it is good for; 0 for ever")
	cmd.Flags().BoolVar(&reusable, "reusable", false, "good for any number of machines")
	cmd.Flags().StringVar(&describe, "description", "", "what it is for")
	cmd.Flags().BoolVar(&command, "print-join-command", false, "print the whole command for the other machine")
	return cmd
}

func tokenList(w *where) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list", Short: "List tokens, without their secrets", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := w.client()
			if err != nil {
				return err
			}
			infos, err := join.ListTokens(cmd.Context(), client)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(infos)
			}
			return printTokens(cmd.OutOrStdout(), infos, time.Now())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printTokens(out io.Writer, infos []join.TokenInfo, now time.Time) error {
	tw := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "ID\tSTATE\tUSES\tDESCRIPTION")
	for _, t := range infos {
		state, uses := "good for ever", "one machine"
		switch {
		case t.UsedBy != "":
			state = "used by " + t.UsedNode()
		case t.Expires.IsZero():
		case now.After(t.Expires):
			state = "expired"
		default:
			state = "expires in " + t.Expires.Sub(now).Round(time.Second).String()
		}
		if t.Reusable {
			uses = "any number"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", t.ID, state, uses, t.Description)
	}
	return tw.Flush()
}

func tokenRevoke(w *where) *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID...", Short: "Remove tokens; machines that joined with them stay", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := w.client()
			if err != nil {
				return err
			}
			for _, id := range ids {
				if t, err := join.ParseToken(id); err == nil { // the whole token does as well
					id = t.ID
				}
				if err := join.RevokeToken(cmd.Context(), client, id); err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), "revoked", id)
			}
			return nil
		},
	}
}
