package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/penstock-vpn/penstock/netstack/gateway"
)

// userFlags are those of penstock user and its verbs.
type userFlags struct {
	config, file    string
	onStdin         bool
	noPassword      bool
	groups, address string
	totp, noTOTP    bool
	issuer          string
	disable, enable bool
	asJSON          bool
	in              io.Reader
	stdout, stderr  io.Writer
	changed         func(flag string) bool
}

func newUser() *cobra.Command {
	f := new(userFlags)
	cmd := &cobra.Command{
		Use:   "user add|passwd|set|rm|list [-c FILE | -f USERS]",
		Short: "manage the users of a server",
		Long: `User changes the file that [auth] users names: one user a line, as htpasswd -B writes them,
with groups, static addresses and a TOTP secret in a third field. A running server notices.
The file is replaced in one step; several may change it at once.

    $ penstock user add -c server.toml alice --groups staff
    $ penstock user passwd -c server.toml alice
    $ penstock user set -c server.toml alice --disable
    $ penstock user rm -c server.toml alice
    $ penstock user list -c server.toml`,
		// Without these cobra shows the help for a verb that there is not, and all seems well.
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVarP(&f.config, "config", "c", "", "the server's configuration `FILE`")
	cmd.PersistentFlags().StringVarP(&f.file, "file", "f", "", "the users' `FILE` itself")
	cmd.AddCommand(f.add(), f.passwd(), f.set(), f.rm(), f.list())
	return cmd
}

// verb makes one of the verbs of penstock user.
func (f *userFlags) verb(use, short string, args cobra.PositionalArgs, do func(path string, args []string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: args,
		RunE: verb(func(cmd *cobra.Command, args []string) error {
			f.in, f.stdout, f.stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			f.changed = cmd.Flags().Changed
			path, err := f.path()
			if err != nil {
				return err
			}
			return do(path, args)
		}),
	}
}

// path is the users' file.
func (f *userFlags) path() (string, error) {
	switch {
	case f.config != "" && f.file != "":
		return "", exitWith(exitUsage, errors.New("-c and -f both say which users are meant; give one"))
	case f.file != "":
		return f.file, nil
	case f.config == "":
		return "", exitWith(exitUsage, errors.New("which users? name the server with -c FILE, or their file with -f"))
	}
	c, err := loadServer(f.config, f.stderr)
	if err != nil {
		return "", err
	}
	return c.Auth.Users, nil
}

func (f *userFlags) options(cmd *cobra.Command, change bool) {
	cmd.Flags().StringVar(&f.groups, "groups", "", "`NAMES` of groups, separated by commas; the first is the one he gets if he does not choose")
	cmd.Flags().StringVar(&f.address, "address", "", "static `ADDRESSES` inside, an IPv4 and an IPv6 one at most, separated by a comma")
	cmd.Flags().BoolVar(&f.totp, "totp", false, "make a secret for codes as second factor, and print it for the authenticator")
	cmd.Flags().StringVar(&f.issuer, "issuer", "Penstock", "the `NAME` under which an authenticator shows the codes")
	if change {
		cmd.Flags().BoolVar(&f.noTOTP, "no-totp", false, "ask for no code any more")
		cmd.Flags().BoolVar(&f.disable, "disable", false, "let him in no more; his sessions end within a minute")
		cmd.Flags().BoolVar(&f.enable, "enable", false, "let him in again")
	}
}

func (f *userFlags) stdinFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.onStdin, "passwd-on-stdin", false, "read the password from the standard input, as one line")
}

func (f *userFlags) add() *cobra.Command {
	cmd := f.verb("add NAME", "add a user", cobra.ExactArgs(1), func(path string, args []string) error {
		e := gateway.UserEntry{Name: args[0], Hash: "*"}
		if problem := gateway.CheckName(e.Name); problem != "" {
			return exitWith(exitUsage, fmt.Errorf("the name %q %s", e.Name, problem))
		}
		uri, err := f.apply(&e)
		if err != nil {
			return exitWith(exitUsage, err)
		}
		if set, err := gateway.ReadUsers(path); err == nil { // before a password is typed in vain
			if _, there := set.Find(e.Name); there {
				return fmt.Errorf("user %s is there already", e.Name)
			}
		}
		if !f.noPassword {
			if e.Hash, err = f.hash(e.Name); err != nil {
				return err
			}
		}
		if err := gateway.EditUsers(path, func(set *gateway.UserSet) error { return set.Add(e) }); err != nil {
			return err
		}
		return f.enrolled(&e, uri)
	})
	f.options(cmd, false)
	f.stdinFlag(cmd)
	cmd.Flags().BoolVar(&f.noPassword, "no-password", false, "no password: he has a certificate")
	return cmd
}

func (f *userFlags) passwd() *cobra.Command {
	cmd := f.verb("passwd NAME", "change a user's password", cobra.ExactArgs(1), func(path string, args []string) error {
		set, err := gateway.ReadUsers(path)
		if err != nil {
			return err
		}
		if _, there := set.Find(args[0]); !there {
			return fmt.Errorf("there is no user %s", args[0])
		}
		hash, err := f.hash(args[0])
		if err != nil {
			return err
		}
		return f.edit(path, args[0], func(e *gateway.UserEntry) error {
			e.Hash = hash
			return nil
		})
	})
	f.stdinFlag(cmd)
	return cmd
}

func (f *userFlags) set() *cobra.Command {
	cmd := f.verb("set NAME", "change a user's groups, addresses, codes, or whether he may come in", cobra.ExactArgs(1), func(path string, args []string) error {
		var uri string
		var changed gateway.UserEntry
		err := f.edit(path, args[0], func(e *gateway.UserEntry) (err error) {
			uri, err = f.apply(e)
			changed = *e
			return err
		})
		if err != nil {
			return err
		}
		return f.enrolled(&changed, uri)
	})
	f.options(cmd, true)
	return cmd
}

func (f *userFlags) edit(path, name string, change func(*gateway.UserEntry) error) error {
	return gateway.EditUsers(path, func(set *gateway.UserSet) error {
		e, there := set.Find(name)
		if !there {
			return fmt.Errorf("there is no user %s", name)
		}
		if err := change(&e); err != nil {
			return err
		}
		return set.Replace(e)
	})
}

// apply makes e what the flags say. uri is for an authenticator, if there is a new secret.
func (f *userFlags) apply(e *gateway.UserEntry) (uri string, err error) {
	if f.disable && f.enable || f.totp && f.noTOTP {
		return "", errors.New("the flags contradict each other")
	}
	split := func(s string) []string {
		if s == "" {
			return nil
		}
		return strings.Split(s, ",")
	}
	if f.changed("groups") {
		if err := e.SetGroups(split(f.groups)); err != nil {
			return "", err
		}
	}
	if f.changed("address") {
		if err := e.SetAddresses(split(f.address)); err != nil {
			return "", err
		}
	}
	switch {
	case f.totp:
		if e.Secret, uri, err = gateway.NewSecret(f.issuer, e.Name); err != nil {
			return "", err
		}
	case f.noTOTP:
		e.Secret = ""
	}
	if f.disable || f.enable {
		e.Disabled = f.disable
	}
	return uri, nil
}

// enrolled prints a new secret.
func (f *userFlags) enrolled(e *gateway.UserEntry, uri string) error {
	if uri == "" {
		return nil
	}
	_, err := fmt.Fprintf(f.stdout, "For the authenticator of %s, as a text or as a QR code:\n\n  %s\n\nSecret: %s\n", e.Name, uri, e.Secret)
	return err
}

// hash asks for a password: twice and without echo at a terminal, else as a line.
func (f *userFlags) hash(name string) (string, error) {
	in, ok := f.in.(*os.File)
	if f.onStdin || !ok || !term.IsTerminal(int(in.Fd())) {
		if !f.onStdin {
			return "", exitWith(exitUsage, errors.New("there is no terminal to ask for the password on; give it with --passwd-on-stdin"))
		}
		line, err := bufio.NewReader(io.LimitReader(f.in, 4096)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		return gateway.HashPassword(strings.TrimRight(line, "\r\n"))
	}
	ask := func(prompt string) (string, error) {
		fmt.Fprint(f.stderr, prompt)
		b, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(f.stderr)
		return string(b), err
	}
	first, err := ask("Password for " + name + ": ")
	if err != nil {
		return "", err
	}
	again, err := ask("Again: ")
	if err != nil {
		return "", err
	}
	if first != again {
		return "", errors.New("the two are not the same; nothing was changed")
	}
	return gateway.HashPassword(first)
}

func (f *userFlags) rm() *cobra.Command {
	return f.verb("rm NAME", "remove a user", cobra.ExactArgs(1), func(path string, args []string) error {
		return gateway.EditUsers(path, func(set *gateway.UserSet) error { return set.Remove(args[0]) })
	})
}

// listedUser is a user as penstock user list --json prints it.
type listedUser struct {
	Name      string   `json:"name"`
	Groups    []string `json:"groups"`
	Addresses []string `json:"addresses"`
	Password  bool     `json:"password"`
	TOTP      bool     `json:"totp"`
	Disabled  bool     `json:"disabled"`
}

func (f *userFlags) list() *cobra.Command {
	cmd := f.verb("list", "list the users", cobra.NoArgs, func(path string, _ []string) error {
		set, err := gateway.ReadUsers(path)
		if err != nil {
			return err
		}
		list := []listedUser{}
		for _, e := range set.Entries() {
			u := listedUser{Name: e.Name, Groups: e.Groups, Password: e.Hash != "*", TOTP: e.Secret != "", Disabled: e.Disabled}
			for _, a := range e.Addresses {
				u.Addresses = append(u.Addresses, a.String())
			}
			list = append(list, u)
		}
		if f.asJSON {
			enc := json.NewEncoder(f.stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(list)
		}
		w := tabwriter.NewWriter(f.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "NAME\tGROUPS\tADDRESSES\tSIGNS IN WITH")
		for _, u := range list {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", u.Name, dash(strings.Join(u.Groups, ",")), dash(strings.Join(u.Addresses, ",")), u.with())
		}
		return w.Flush()
	})
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print everything, as JSON")
	return cmd
}

func (u *listedUser) with() string {
	var with []string
	if u.Password {
		with = append(with, "password")
	} else {
		with = append(with, "certificate")
	}
	if u.TOTP {
		with = append(with, "code")
	}
	s := strings.Join(with, " and ")
	if u.Disabled {
		s = "(disabled) " + s
	}
	return s
}
